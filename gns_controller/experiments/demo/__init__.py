"""The demonstration: five ways to choose a batch, on real text, watched live on the controller's page."""

from gns_controller.experiments.demo.run import DemoSettings, run_demo

__all__ = ["DemoSettings", "run_demo"]
