"""AdaFuse inside vLLM.

    attach.py      config: an adapter named -> checked, architecture chosen   (front end)
    options.py     the keys that people give to vLLM for us                   (front end)
    models.py      AdaFuse<Architecture> classes, made from vLLM's own        (worker)
    content.py     which values of the adapter a worker holds                 (worker)
    projections.py which linears take experts, how they lie in projections    (worker)
    bank.py        expert weights of one projection, sharded with it          (worker)
    routes.py      the step's static buffers, passports, live router          (worker)
    ops.py         the ops that a compiled model holds                        (worker)
    kv_cache.py    who writes keys and values into vLLM's KV cache            (worker)
    layer_wise.py  who gets which bank where layers route themselves          (worker)
    layer_bank.py  experts and routers of one such projection                 (worker)
    warm_up.py     compiles kernels before the first request                  (worker)
    wrap/          every replacement of a module of vLLM's                    (worker)
    vllm_api.py    vLLM's versions and what differs between them              (both)

Where requests choose their adapters (`--enable-lora`):

    adapters.py    an adapter directory, opened and checked                   (both)
    versions.py    which content a request means; checks, done once           (front end)
    manager.py     the adapters of a worker, in the place of vLLM's manager   (worker)
    pool.py        which adapters lie on the device, on which pages           (worker)
    hosted.py      adapters in host memory, as this rank needs them           (worker)
    paged_model.py which linears get pages                                    (worker)
    page_bank.py   the pages of one projection                                (worker)
    page_step.py   the step's buffers: whose each token is, and its gates     (worker)
"""
