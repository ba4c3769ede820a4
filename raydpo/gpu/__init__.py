"""The verb ``raydpo gpu check``: proves on a GPU what no CPU can prove. Imports neither Ray nor polars."""
