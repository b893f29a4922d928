"""Files for LiteRT: export, conversion, inputs, report, runner."""
