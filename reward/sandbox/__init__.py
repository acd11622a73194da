"""Runs a model's programs against tests, so that a program can neither do harm nor forge the verdict.

The trainer uses `pool.Sandbox`; docs/sandbox.md says what is contained on which platform, and what is not.
A job is two processes. The program's process (`program`) holds the program alone, and executes calls that come over a
socket, one at a time. The tests' process (`examine`) holds the tests and the pipe for the verdict; there, a stand-in
for each function of the program (`remote`) sends the arguments and receives plain values (`values`). Both processes
are forked from a small server that keeps modules in memory (`server`), and `confine`, `root`, `landlock` and `seccomp`
confine them before they read anything.
"""
