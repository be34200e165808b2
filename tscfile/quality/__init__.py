"""How much a lossy cache costs, measured on a real model (DESIGN section 10).

`protocol` runs the measurement, `codec` says what is measured, `engine` is the model, `windows`
chooses the text, `metrics` compares next-token distributions, `report` and `plot` show the result,
`peers` holds other people's codecs for comparison, `page_delta` and `book_delta` are differences
between token positions, `claims` puts the TSC reports to the test. Needs the extra ``hf``.
"""
