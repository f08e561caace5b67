"""What the guard against losses that are not finite costs in a training step.

    python benchmarks/step_flags.py [--device cuda] [--dtype bfloat16] [--batch-size 128] [--turns 9] [--json]

The same steps of TinyViT-5M (forward, backward, norm of the gradients, fused AdamW) in turns: without any guard, with
`StepFlags`, which reads what a step found one step late, and with a read of it in each step (`item()`), which waits for
the device. On a GPU the host issues work ahead of the device, and a read in each step takes that lead away. Prints
milliseconds a step, median over the turns, and the ratio to the steps without a guard.
"""

import argparse
import json
import statistics
import time

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator

import timm_tinyvit  # noqa: F401  registers the models
from timm_tinyvit.base.launch import StepFlags, device_name

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16}
GUARDS = ('none', 'late', 'each step')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--dtype', default='float32', choices=DTYPES, help='bfloat16 runs under autocast')
    parser.add_argument('--model', default='tiny_vit_5m_224')
    parser.add_argument('--img-size', type=int, default=224)
    parser.add_argument('--batch-size', type=int, default=128)
    parser.add_argument('--steps', type=int, default=20, help='steps of a turn')
    parser.add_argument('--turns', type=int, default=9)
    parser.add_argument('--json', action='store_true', help='one JSON line per figure')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(cpu=args.device == 'cpu')
    device = accelerator.device
    torch.manual_seed(0)
    model = timm.create_model(args.model, img_size=args.img_size).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    views = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)
    views = views.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(model.num_classes, (args.batch_size,), device=device)

    def steps(guard: str) -> float:
        """Milliseconds a step."""
        flags = StepFlags(accelerator)
        start = time.perf_counter()
        for step in range(args.steps):
            with torch.autocast(device.type, DTYPES[args.dtype], args.dtype != 'float32'):
                logits = model(views)
            loss = F.cross_entropy(logits.float(), labels)
            loss.backward()
            norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
            if guard == 'late':
                flags.push(step, ~torch.isfinite(loss.detach() + norm), False)
                assert not any(sum(values) for _, values in flags.due())
            elif guard == 'each step':
                assert (loss.detach() + norm).isfinite().item()
            optimizer.step()
            optimizer.zero_grad()
        if device.type != 'cpu':
            torch.accelerator.synchronize()
        return 1000 * (time.perf_counter() - start) / args.steps

    for guard in GUARDS:  # warms up
        steps(guard)
    times = {guard: [] for guard in GUARDS}
    for _ in range(args.turns):
        for guard in GUARDS:
            times[guard].append(steps(guard))
    for guard in GUARDS:
        ratio = statistics.median(own / plain for own, plain in zip(times[guard], times['none']))
        figure = dict(
            benchmark='step_flags', guard=guard, model=args.model, img_size=args.img_size, batch_size=args.batch_size,
            dtype=args.dtype, ms_per_step=round(statistics.median(times[guard]), 3), ratio=round(ratio, 4),
            machine=device_name(device), threads=torch.get_num_threads(), torch=torch.__version__)
        if args.json:
            print(json.dumps(figure), flush=True)
        else:
            print(f'{guard:12} {figure["ms_per_step"]:10.3f} ms a step   {ratio:.4f}')


if __name__ == '__main__':
    main()
