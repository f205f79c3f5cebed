"""
Workarounds for other libraries, one file per library. Each file names the problem, the version, and the test that
fails once the workaround is no longer needed.
"""
