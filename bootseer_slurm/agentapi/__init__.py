"""All that hook, plugin, importer, jobs and people say to the node agent: messages, operations, and a client.

Light: nothing here imports more than the standard library and `errors`, for jobs and hooks load it.
"""
