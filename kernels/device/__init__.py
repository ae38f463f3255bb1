"""Device code that several kernels share: nothing here launches."""
