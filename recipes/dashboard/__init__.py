"""The dashboard: an HTML page of run dirs, and a wandb workspace.

May import recipes.run and recipes.monitor.metric_registry; neither torch nor DeepSpeed, so that it starts in a second.
"""
