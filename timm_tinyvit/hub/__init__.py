"""Cards, and pushes of models and stores to the Hugging Face Hub; conversion and export of models."""
