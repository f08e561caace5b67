"""The models: TinyViT and the paper's CLIP teacher, registered with timm, and how weights are loaded and saved."""
