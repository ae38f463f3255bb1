"""The command line `vllm-adafuse`: one file per subcommand, heavy imports inside `run`."""
