"""How much a lossy cache costs, measured on a real model (DESIGN section 10).

`protocol` runs the measurement, `codec` says what is measured, `engine` is the model, `windows`
chooses the text, `metrics` compares next-token distributions, `report` and `plot` show the result,
`peers` holds other people's codecs for comparison. Needs the extra ``hf``.
"""
