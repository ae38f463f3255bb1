"""Does a route decided once per token cost quality? A real training, from text to table.

`corpus` gathers text that machines carry, `sizes` and `methods` say what is compared, `backbone`
pretrains a small Llama, `adapt` trains one method with one seed, `speed` times the results in
vLLM, `report` writes docs/quality.md. `python -m benchmarks.quality --help` runs it.
"""
