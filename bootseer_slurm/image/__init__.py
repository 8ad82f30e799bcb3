"""Images: squashfs files that containers start from."""
