"""One runnable module per claim. Each prints a table; with `--json` one object
`{"benchmark", "machine", "figures": [{"name", "value", "unit", "reach", "holds"}]}`; `--quick` ends in 60 seconds."""
