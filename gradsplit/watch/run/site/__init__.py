"""A folder that is put first on PYTHONPATH, so that Python itself runs its sitecustomize in every process."""
