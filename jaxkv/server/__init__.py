"""An engine behind HTTP: the API of OpenAI, for `jaxkv serve`."""
