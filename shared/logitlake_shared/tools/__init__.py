"""What the `logitlake` command can do with a lake, beside asking it in SQL: one module computes, others show.

    inspect_sample, token_text, inspect_text             one sample or pair, token by token
    stats, stats_text, stats_page, stats_plot            a lake in figures: terminal, HTML, PNG
    diff, divergence, diff_text                          two caches compared
    verify, row_laws                                     every byte and every law
    gc                                                   what nobody can reach

None of them prints or parses arguments; `logitlake_shared.cli` and `cli_care` do.
"""
