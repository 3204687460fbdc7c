#!/usr/bin/env bash
set -eux
torchrun --standalone --nproc_per_node=8 train_gpt.py config/train_gpt2.py
