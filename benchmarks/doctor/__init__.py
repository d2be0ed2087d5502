"""What `openelm doctor` asks of a device: whether it computes correctly, and with --full what its
work costs, so that one file answers every open question about a device that nobody here has.

Everything is compared with float32 on the processor. Engines are not compared here, and nothing is
printed: the command line does that.
"""
