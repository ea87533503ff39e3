"""The configuration: the settings (`schema`), the rank grid (`degrees`), Hydra's composition (`compose`) and its YAML.

May import no other folder of this project, and neither torch nor DeepSpeed, so that mistakes show within a second.
"""
