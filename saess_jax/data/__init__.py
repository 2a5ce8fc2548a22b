"""From prompt files to batches: `sources` and `builder` read rows, `chat` tokenises, `probes` and `pipeline` batch."""
