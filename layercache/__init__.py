"""Content-addressed, per-tenant cache of OCI image layers for model serving."""
