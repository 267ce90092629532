"""The BranchBench workloads: closed-loop load made of branching programs, against any OpenAI-compatible server."""
