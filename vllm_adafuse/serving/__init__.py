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

Where requests choose their adapters (`--enable-lora`):

    adapters.py    an adapter directory, opened and checked                   (both)
    versions.py    which content a request means; checks, done once           (front end)
    manager.py     the adapters of a worker, in the place of vLLM's manager   (worker)
    pool.py        which adapters lie on the device, on which pages           (worker)
    hosted.py      adapters in host memory, as this rank needs them           (worker)
    paged_model.py which linears get pages                                    (worker)
    page_bank.py   the pages of one projection                                (worker)
    page_step.py   the step's buffers: whose each token is, and its gates     (worker)
    vllm_api.py    what of vLLM differs between its versions                  (worker)
"""
