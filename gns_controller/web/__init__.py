"""HTTP: thin routes over the controller, problems as RFC 9457, an event stream, and the page."""

from gns_controller.web.app import create_app

__all__ = ["create_app"]
