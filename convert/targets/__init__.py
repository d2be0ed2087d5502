"""What weights become besides a model folder for MLX: GGUF files for llama.cpp."""
