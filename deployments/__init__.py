"""The Ray Serve application. The wheel has this package as `llava_serve_deployments`: its modules import each other
relatively, and whoever needs its name takes `PACKAGE`."""

PACKAGE = __name__
