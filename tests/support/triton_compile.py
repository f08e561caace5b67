"""Compiles the Triton kernels of the loss for a GPU that need not be there; prints how many bytes of code they have."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from timm_tinyvit.targets import sparse_triton


def signature(kernel: triton.JITFunction, dtype: str, has_rest: bool) -> dict[str, str]:
    """The types of a kernel's arguments for logits of a type."""
    types = dict(
        logits_ptr=f'*{dtype}', grad_ptr=f'*{dtype}', ids_ptr='*i64', inverse_temperature='fp32', scale='fp32',
        log_rest_ptr='*fp32' if has_rest else 'constexpr', BLOCK='constexpr', BLOCK_K='constexpr')
    return {name: types.get(name, '*fp32' if name.endswith('_ptr') else 'i32') for name in kernel.arg_names}


def main() -> None:
    for kernel, block in ((sparse_triton._forward_kernel, sparse_triton.FORWARD_BLOCK),
                          (sparse_triton._backward_kernel, sparse_triton.BACKWARD_BLOCK)):
        for dtype, has_rest in (('fp32', True), ('bf16', True), ('fp16', True), ('fp32', False)):
            sizes = sparse_triton._sizes(21841, 100, block)
            options = {'num_warps': sizes.pop('num_warps')}
            constants = sizes if has_rest else sizes | {'log_rest_ptr': None}
            source = ASTSource(kernel, signature(kernel, dtype, has_rest), constants)
            code = triton.compile(source, target=GPUTarget('cuda', 90, 32), options=options)
            print(len(code.asm['cubin']))


if __name__ == '__main__':
    main()
