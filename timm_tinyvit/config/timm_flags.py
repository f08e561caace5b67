"""Flags of timm's train.py and validate.py that are not taken here: why, and what to do instead.

docs/timm_flags.md has the same table, beside the flags that are taken; a test compares it with timm's own.
"""

__all__ = ['REFUSED', 'REFUSED_BY_EVAL', 'refusal']

# Names, and why they are not taken.
REFUSED = (
    ('resume no-resume-opt start-epoch wandb-resume-id',
     'the same command resumes a run, from the last checkpoint in its folder'),
    ('device device-modules local_rank num-gpu no-ddp-bb synchronize-step',
     'accelerate launch starts the processes, one for each device; CUDA_VISIBLE_DEVICES chooses devices, and is empty '
     'for the CPU'),
    ('pin-mem no-prefetcher use-multi-epochs-loader worker-seeding',
     'the loader keeps its processes, pins memory for GPUs, and draws views by --store-seed alone; leave it out'),
    ('in-chans input-img-mode', 'all images are read as RGB, grey ones too; leave it out'),
    ('mean std', 'images are normalised as the model says; change that as in --model-kwargs '
                 "pretrained_cfg_overlay={'mean':(0.5,0.5,0.5)}"),
    ('train-num-samples val-num-samples num-samples',
     'rows are counted; take some of them with a slice, as in --train-split train[:1000] or --val-split'),
    ('dataset-download dataset-trust-remote-code',
     'data sets of the Hub are downloaded by their names, and no code of theirs is run; leave it out'),
    ('gp drop-block bn-momentum bn-eps',
     'arguments of some models are given as --model-kwargs: global_pool=avg, drop_block_rate=0.1, bn_momentum=0.1, '
     'bn_eps=1e-5'),
    ('drop-connect', 'its new name is --drop-path'),
    ('head-init-scale head-init-bias',
     'a classifier starts as its model makes it, or from zero where --initial-checkpoint has other classes; leave it '
     'out'),
    ('torchscript fuser aot-autograd torchcompile-mode',
     'torch.compile is what makes a model faster, in its default mode: --compile'),
    ('model-dtype fast-norm',
     'weights stay in float32, and autocast decides what is computed in half precision; see --amp-dtype'),
    ('layer-decay-min-scale layer-decay-no-opt-scale',
     'timm\'s optimisers take it as --opt-kwargs layer_decay_min_scale=0.1 or layer_decay_no_opt_scale=0.1'),
    ('lr-base-scale', 'learning rates grow with the images per update, whatever the optimiser; give another as --lr'),
    ('sched-on-updates warmup-prefix lr-noise lr-noise-pct lr-noise-std lr-cycle-mul lr-cycle-decay lr-cycle-limit '
     'lr-k-decay patience-epochs',
     'a schedule is one cycle that is stepped by update, warm-up included, without noise; shape it with --sched, '
     '--warmup-epochs, --min-lr and --cooldown-epochs'),
    ('epoch-repeats train-batches-per-epoch train-steps-per-epoch',
     'an epoch is every image once; give more or fewer of them with --epochs'),
    ('aug-repeats', '--views-per-image N puts N views of an image in a batch'),
    ('aug-splits resplit split-bn jsd-loss',
     'a batch is not split by augmentation; --views-per-image N puts N views of an image in it'),
    ('bce-pos-weight', 'right and wrong classes weigh the same; leave it out'),
    ('mixup-off-epoch', 'views are mixed in all epochs, as a teacher has seen them; leave it out'),
    ('dist-bn', 'running statistics are those of the first process; --sync-bn has them of all'),
    ('model-ema-force-cpu', 'the average of the weights stays on the device; leave it out'),
    ('eval-metric', 'the best model is that of the highest top-1; metrics.csv has the others'),
    ('tta test-pool', 'an image is evaluated once and in one crop; see --crop-pct and --crop-mode'),
    ('save-images', 'timm-tinyvit report STORE --gallery FILE draws the views of a store'),
    ('log-wandb wandb-project wandb-tags',
     '--log wandb reports to the project timm_tinyvit, under the name of the folder of the run; WANDB_TAGS gives tags'),
    ('train-img-sizes train-batch-sizes train-size-probs train-size-schedule train-size-schedule-spread '
     'train-size-random-mix variable-batch-loss-scale naflex-loader naflex-train-seq-lens naflex-max-seq-len '
     'naflex-patch-sizes naflex-patch-size-probs naflex-loss-scale naflex-patchify-channels-first',
     'the images of a run have one size, --img-size; go from size to size with --initial-checkpoint'),
    ('kd-distill-type kd-loss-type kd-token-distill-type kd-student-feature-dim kd-teacher-feature-dim',
     'a student learns from the most probable classes of its teacher, and not from features; see --alpha and '
     '--temperature'),
)

# Those of an evaluation: validate.py has a few more.
REFUSED_BY_EVAL = (
    *REFUSED,
    ('use-train-size crop-border-pixels tf-preprocessing',
     'images are cropped as the model says, or as --img-size, --crop-pct, --crop-mode and --interpolation do'),
    ('class-map', 'classes are known by the names in the config.json beside the weights; leave it out'),
    ('use-ema', 'name the averaged weights, as in RUN/best_ema'),
    ('reparam torchcompile', 'the model is evaluated as it was trained; leave it out'),
    ('results-file results-format log-freq metrics-avg',
     'the result is one line on stdout, of loss and accuracy; redirect it'),
    ('real-labels valid-labels',
     'loss and accuracy are those of the labels of the data; give others as a column with --target-key'),
    ('retry', 'give a smaller --batch-size where memory runs out'),
    ('seed', 'nothing is drawn in an evaluation; leave it out'),
)


def refusal(groups: tuple[tuple[str, str], ...], flag: str) -> str | None:
    """Why one of these flags of timm, as in `--resume`, is not taken; None of any other."""
    # A recipe may have either sign between words.
    name = flag.removeprefix('--').replace('_', '-')
    why = next((why for names, why in groups if name in names.replace('_', '-').split()), None)
    return why and f'{flag} of timm is not taken here: {why}'
