"""The claims of the TSC reports, measured: ``tsc eval --report claims``.

`catalogue` lists what the reports say, `experiments` and `arithmetic` answer with measurements,
`verdicts` has the rules that turn those into words, `page` shows them. `vector`, `eviction`,
`growing` and `low_rank` hold the codecs of the reports that are no peers, `calculators` their
fleet and energy arithmetic, `statistics` what is counted on caches and weights themselves.
"""
