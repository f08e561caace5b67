"""Speed of the TinyViT models beside timm's own class: same weights, same batch, in turns in the same run.

    python benchmarks/model_speed.py
    python benchmarks/model_speed.py --models tiny_vit_5m_224 --modes inference --quick
    python benchmarks/model_speed.py --modes inference train --compile --turns 9 --json
    python benchmarks/model_speed.py --threads 1 2 --dtype bfloat16      # for processors with AMX or AVX512-BF16

Inference is measured on the models as they are created and put in eval mode. timm's class runs as it comes (channels
first), in channels-last memory, with its batch norm folded by `timm.utils.reparameterize_model`, and fed in batches of
2 and 4, which helps a CPU's cache; ours as it comes and after `reparameterize_model`. A training step is forward,
backward and fused AdamW, everything in channels-last memory. `--compile` puts every model through `torch.compile`.

A ratio is the median over the turns of the peer's time divided by ours, so above 1 ours is the faster. On a CPU it is
the processor time of all threads, and images/s are those of a processor second, so that other work on the machine does
not decide; the clock's stand beside. A product of two square matrices takes its turns too: its rate is what the
processor can do, and `share` how much of it each model reaches. `difference` is the largest difference from timm's
logits over the largest of those. On two CPU cores the default takes 6 minutes; the compiler adds up to 2 minutes per
model and mode.
"""

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from timm.models import tiny_vit as timm_tiny_vit
from timm.utils import reparameterize_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_tinyvit.base.launch import device_name
from timm_tinyvit.models.tiny_vit import Attention

MATRIX = 1536  # rows and columns of the matrix product
MODELS = ('tiny_vit_5m_224', 'tiny_vit_11m_224', 'tiny_vit_21m_224', 'tiny_vit_21m_384', 'tiny_vit_21m_512')
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--models', nargs='+', default=list(MODELS[:3]), choices=MODELS, metavar='NAME')
    parser.add_argument('--modes', nargs='+', default=['inference', 'train'], choices=['inference', 'train'])
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--dtype', default='float32', choices=DTYPES, help='bfloat16 runs under autocast')
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument(
        '--threads', nargs='+', type=int, default=[torch.get_num_threads()], metavar='N', help='CPU threads')
    parser.add_argument('--turns', type=int, default=9, help='measurements of each model')
    parser.add_argument('--compile', action='store_true', help='measure compiled models')
    parser.add_argument('--quick', action='store_true', help='three turns')
    parser.add_argument('--json', action='store_true', help='one JSON line per figure')
    return parser.parse_args()


def machine(args: argparse.Namespace) -> dict[str, str]:
    """What the figures belong to."""
    return dict(
        device=device_name(args.device), cpu_capability=torch.backends.cpu.get_cpu_capability(),
        torch=torch.__version__, timm=timm.__version__)


def size_of(name: str) -> dict[str, float]:
    """Millions of parameters, and billions of multiply-accumulates for one image: half of PyTorch's count of flops."""
    model = timm.create_model(name, device='meta').eval()
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused_attn = False  # the counter knows matrix products
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *model.pretrained_cfg['input_size'], device='meta'))
    return dict(
        million_parameters=round(sum(param.numel() for param in model.parameters()) / 1e6, 2),
        giga_macs=round(counter.get_total_flops() / 2e9, 2))


def make_pair(name: str, device: str) -> tuple[nn.Module, nn.Module]:
    """Our model and timm's, with the same weights."""
    torch.manual_seed(0)
    theirs = getattr(timm_tiny_vit, name)(pretrained_cfg_overlay=dict(num_classes=1000), drop_path_rate=0.)
    with torch.no_grad():  # an untrained batch norm does nothing, which is easy to get right
        for module in theirs.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
    ours = timm.create_model(name, drop_path_rate=0.)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(device), theirs.to(device)


def fold(model: nn.Module) -> nn.Module:
    """The model with its batch norms folded; timm's `fuse` makes convolutions on the CPU in float32."""
    param = next(model.parameters())
    return reparameterize_model(model).to(device=param.device, dtype=param.dtype)


def channels_last(module_or_tensor):
    return module_or_tensor.to(memory_format=torch.channels_last)


def inference_runs(name: str, args: argparse.Namespace) -> dict[str, Callable[[], torch.Tensor]]:
    ours, theirs = (model.eval() for model in make_pair(name, args.device))
    size = theirs.pretrained_cfg['input_size']
    x = torch.randn(args.batch_size, *size, device=args.device)
    x_last = channels_last(x)
    theirs_last = channels_last(copy.deepcopy(theirs))
    theirs_folded = channels_last(fold(theirs))
    wrap = torch.compile if args.compile else lambda model: model

    def run(model: nn.Module, batch: torch.Tensor, split: int | None = None) -> Callable[[], torch.Tensor]:
        model = wrap(model)

        def forward() -> torch.Tensor:
            with torch.inference_mode(), torch.autocast(x.device.type, DTYPES[args.dtype], args.dtype != 'float32'):
                if split is None:
                    return model(batch)
                return torch.cat([model(part) for part in batch.split(split)])

        return forward

    runs = {'timm': run(theirs, x), 'timm channels-last': run(theirs_last, x_last)}
    if not args.compile:
        runs['timm folded'] = run(theirs_folded, x_last)
        for split in (2, 4):
            runs[f'timm in batches of {split}'] = run(theirs_last, x_last, split)
    runs['ours'] = run(ours, x)
    runs['ours folded'] = run(fold(ours), x)
    return runs


def training_runs(name: str, args: argparse.Namespace) -> dict[str, Callable[[], torch.Tensor]]:
    ours, theirs = (channels_last(model.train()) for model in make_pair(name, args.device))
    x = channels_last(torch.randn(args.batch_size, *theirs.pretrained_cfg['input_size'], device=args.device))
    target = torch.randint(0, 1000, (args.batch_size,), device=args.device)

    def run(model: nn.Module) -> Callable[[], torch.Tensor]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        forward = torch.compile(model) if args.compile else model

        def step() -> torch.Tensor:
            optimizer.zero_grad()
            with torch.autocast(x.device.type, DTYPES[args.dtype], args.dtype != 'float32'):
                logits = forward(x)
            F.cross_entropy(logits.float(), target).backward()
            optimizer.step()
            return logits.detach()

        return step

    return {'timm channels-last': run(theirs), 'ours': run(ours)}


def matrix_product(args: argparse.Namespace) -> Callable[[], torch.Tensor]:
    """What the processor does best: 2 * MATRIX ** 3 operations."""
    left, right = torch.randn(2, MATRIX, MATRIX, device=args.device, dtype=DTYPES[args.dtype])
    return lambda: left @ right


def measure(
        runs: dict[str, Callable[[], torch.Tensor]],
        turns: int,
        device: str,
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of the processor (on an accelerator of the clock) and of the clock, of each run in each turn."""
    times = {name: [] for name in runs}
    processor = time.perf_counter if device.startswith('cuda') else time.process_time
    for _ in range(turns):
        for name, run in runs.items():
            start, clock = processor(), time.perf_counter()
            run()
            if device.startswith('cuda'):
                torch.cuda.synchronize()
            times[name].append((processor() - start, time.perf_counter() - clock))
    return times


def show(name: str, mode: str, threads: int, args: argparse.Namespace, where: dict[str, str]) -> None:
    """Measure a model and print its figures."""
    torch.set_num_threads(threads)
    size = size_of(name)
    runs = (inference_runs if mode == 'inference' else training_runs)(name, args)
    logits = {peer: run().float() for peer, run in runs.items()}  # warms up, and compiles
    reference = next(iter(logits.values()))
    load = os.getloadavg()[0]  # of everything that runs on the machine, before the measurement
    times = measure(runs | {'product': matrix_product(args)}, 3 if args.quick else args.turns, args.device)
    spent = {peer: statistics.median(seconds for seconds, _ in values) for peer, values in times.items()}
    product = 2 * MATRIX ** 3 / spent.pop('product') / 1e9
    if not args.json:
        print(f'\n{name} {mode}{" compiled" if args.compile else ""} {args.dtype}, batches of {args.batch_size}, '
              f'{threads} thread(s), load {load:.1f}: {size["million_parameters"]} M parameters, {size["giga_macs"]} '
              f'GMACs\n  {"a matrix product":24} {product:8.0f} GFLOP/s\n'
              f'  {"":24} images/s   the clock\'s   share   ours is faster by, folded by   difference')
    for peer, seconds in spent.items():
        rate = args.batch_size / seconds
        # A step is the forward pass and twice as much backward.
        operations = 2 * size['giga_macs'] * (1 if mode == 'inference' else 3)
        figure = dict(
            model=name, mode=mode, compiled=args.compile, dtype=args.dtype, batch_size=args.batch_size, threads=threads,
            peer=peer, images_per_second=round(rate, 1),
            images_per_second_of_the_clock=round(
                args.batch_size / statistics.median(clock for _, clock in times[peer]), 1),
            product_gflops=round(product), share=round(rate * operations / product, 3),
            difference=((logits[peer] - reference).abs().max() / reference.abs().max()).item())
        for own in ('ours', 'ours folded'):
            if own in times:
                figure[f'ratio_of_{own.replace(" ", "_")}'] = round(statistics.median(
                    theirs / mine for (theirs, _), (mine, _) in zip(times[peer], times[own])), 2)
        if args.json:
            print(json.dumps({**figure, **size, 'load_average': round(load, 1), **where}), flush=True)
        else:
            folded = figure.get('ratio_of_ours_folded', float('nan'))
            print(f'  {peer:24} {rate:8.1f}   {figure["images_per_second_of_the_clock"]:11.1f}   {figure["share"]:5.0%}'
                  f'   {figure["ratio_of_ours"]:17.2f}   {folded:9.2f}   {figure["difference"]:10.1e}', flush=True)


def main() -> None:
    args = parse_args()
    where = machine(args)
    if not args.json:
        print(', '.join(f'{key} {value}' for key, value in where.items()))
    for name in args.models:
        for mode in args.modes:
            for threads in args.threads:
                show(name, mode, threads, args, where)


if __name__ == '__main__':
    main()
