"""The methods themselves: numpy only, no Ray, no OpenRLHF."""
