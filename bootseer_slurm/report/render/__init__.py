"""Reports and totals for people and for programs: terminal, HTML, JSON, CSV, Parquet, Perfetto."""
