"""The app: without a browser, and in a real one."""
