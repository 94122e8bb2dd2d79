"""What a worker of Ray loads with Keras."""

import ray

from cluster.lean import LEFT_OUT


def test_keras_leaves_out_what_it_would_only_import_and_others_have_it(ray_cluster: None) -> None:
    # In a process that has done nothing else.
    @ray.remote(num_cpus=0, runtime_env={"env_vars": {"HELIO_TEST": "lean"}})
    def load() -> tuple[set[str], str]:
        import sys

        import jobs.model.convnet  # imports Keras

        assert jobs.model.convnet.keras
        loaded = set(LEFT_OUT) & set(sys.modules)
        import pandas as pd

        return loaded, pd.DataFrame.__name__

    assert ray.get(load.remote()) == (set(), "DataFrame")
