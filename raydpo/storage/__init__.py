"""Files by local path or URI."""
