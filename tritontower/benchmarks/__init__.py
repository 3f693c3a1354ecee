"""What it costs: kernels, towers, preprocessing, loading, launches and memory, measured beside what else there is.

Each module here measures one thing and returns a *document*: plain data with the machine, the versions and the command
beside the figures (:mod:`.documents`).  ``tritontower bench`` prints, keeps and draws them.
"""
