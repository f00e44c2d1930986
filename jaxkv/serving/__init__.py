"""Requests that come and go on rows of fixed size: `jaxkv.Engine`."""
