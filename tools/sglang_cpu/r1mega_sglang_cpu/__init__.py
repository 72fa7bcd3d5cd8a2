"""The stock SGLang 0.5.21 on a machine without a GPU: `hook` before its imports, `plugin` after them."""
