"""Recipes, the settings they set, and what every entry point shares.

==============  ==============================================================================
``settings``    every setting of every stage, declared once
``loader``      defaults, then YAML, then ``section.name=value`` of the command line
``limits``      which values make sense
``entry``       how a command reads its recipe and how it ends
``errors``      what a user is told, and with which exit code
``signals``     SIGTERM and SIGINT between two units of work
``status``      the line on stderr that says how far something long is
==============  ==============================================================================

Beside them: recipes (``*.yaml``), ``accelerate/`` for launchers and the ``deepspeed/`` files that those name.
"""
