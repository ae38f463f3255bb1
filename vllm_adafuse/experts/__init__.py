"""From LoRAs to a mixture: `vllm-adafuse compose-experts`.

`loras.py` stacks plain PEFT LoRAs as experts, `samples.py` reads texts of their domains,
`router.py` fits a router to them, `separability.py` says how well it can work, `picture.py` draws
that, `compose.py` does all of it.
"""
