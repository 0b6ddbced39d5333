"""LoRA adapters: files in the layouts that are in circulation, names, layers by PEFT, switching."""
