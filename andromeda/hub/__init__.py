"""Models in and out of Hugging Face folders and GGUF files. A folder from a stranger is data: nothing in it is imported or run."""
