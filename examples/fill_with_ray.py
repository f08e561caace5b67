"""Fill one store with every GPU of a Ray cluster, or, where it has none, with one process per node.

    python examples/fill_with_ray.py --dataset ILSVRC/imagenet-1k --teacher convnext_large.fb_in22k_ft_in1k \
        --logits /shared/stores/in1k --epochs 300

The flags are those of `timm-tinyvit fill`; the nodes share the store. Each worker takes the next missing
shard, so workers may come, go and die at any time: Ray starts another, and the same command fills what is missing.
"""

import sys

import ray


@ray.remote(max_retries=3)
def fill(flags: list[str]) -> None:
    """Take missing shards until none is left."""
    from timm_tinyvit import save_logits

    try:
        save_logits.main(flags)
    except SystemExit as end:
        # The worker has printed the reason; Ray would take its exit for a crash, and try again.
        raise RuntimeError(f'a worker ended with status {end.code}') from None


def main(flags: list[str]) -> None:
    ray.init()
    gpus = int(ray.cluster_resources().get('GPU', 0))
    nodes = sum(node['Alive'] for node in ray.nodes())
    worker = fill.options(num_gpus=1 if gpus else 0, scheduling_strategy='SPREAD')
    ray.get([worker.remote(flags) for _ in range(gpus or nodes)])


if __name__ == '__main__':
    main(sys.argv[1:])
