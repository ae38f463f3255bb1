"""AdaFuse inside vLLM.

    attach.py      config: an adapter named -> checked, architecture chosen   (front end)
    models.py      AdaFuse<Architecture> classes, made from vLLM's own        (worker)
    router.py      static route buffers, passports, live router               (worker)
    bank.py        expert weights of one projection, sharded with it          (worker)
    linear.py      the linear method that adds the deltas                     (worker)
    norm.py        norms that end the projection before them                  (worker)
    rotary.py      rotary embeddings that end qkv_proj                        (worker)
    kv_cache.py    who writes keys and values into vLLM's KV cache            (worker)
    layer_wise.py  who gets which bank where layers route themselves          (worker)
    layer_bank.py  experts and routers of one such projection                 (worker)
"""
