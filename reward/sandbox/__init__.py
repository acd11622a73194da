"""Runs programs that a model wrote against tests, so that they harm nothing and cannot forge the verdict.

`pool.Sandbox` is what the trainer uses; docs/sandbox.md says what is contained, on which platform, and what is not.
A job is two processes. The program's own (`program`) has the program and nothing else: it is asked for calls, one at
a time, over a socket. The tests' process (`examine`) has the tests and the pipe for the verdict; a function of the
program is there only as a stand-in that sends the arguments over and takes plain values back (`values`). Both are
forked from a small process that keeps the modules in memory (`server`) and are confined by `confine`, `root`,
`landlock` and `seccomp` before they read anything.
"""
