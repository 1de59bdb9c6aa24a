"""The subcommands: `configure` adds what each takes to its parser, `run` carries it out and returns its exit status."""
