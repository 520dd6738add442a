"""The subcommands of ``lamp-compile``, one file each: ``add(parser)`` states the options, ``run(args)`` does the work.

What is heavy is imported inside ``run``, so that ``--help`` and usage errors are quick.
"""
