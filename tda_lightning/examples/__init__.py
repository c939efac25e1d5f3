"""The data modules and models that conf/experiment names."""
