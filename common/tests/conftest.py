from common.tests.zygote import quick_workers  # noqa: F401  (a fixture for every test)
