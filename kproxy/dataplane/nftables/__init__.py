"""nftables mode: services as elements of maps. README.md beside this file explains the layout."""
