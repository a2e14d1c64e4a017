"""Examples: what people come to revlib for, each in at most 100 lines, and runnable.

==================  ==================================================================================
revnet              RevNet for CIFAR-10: batch norm and downsampling in one sequence
unet                an invertible U-Net for images and volumes, with skip connections as streams
language_model      a causal language model at a context that plain training has no memory for
experts             a mixture of experts: routing that survives inversion, and its balance as a stream
adapters            fine-tuning with adapters on a frozen base
loops               the training loops of Lightning and of Accelerate, ten lines each
footprints          bytes that training takes of the first two, by depth, against three other ways
==================  ==================================================================================

Each is a command, ``python -m research.examples.NAME --help``. The tests run all of them at toy size.
"""
